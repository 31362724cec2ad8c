"""An adapter in numbers, from its state alone or with the base's weights; nothing here touches a model or a disk.

describe(state)          one record per site: norms, spectra, beside the base's weights           `tables`, `page` show them
compare(a, b)            cosine and subspace similarity site by site, with what chance gives
spectra, Spectrum        singular values, effective and stable rank, energy
amplification            ΔW through the directions of W
intruders                directions that W did not have
phi, phis, by_chance     subspace similarity and its random baseline
"""

from deltaw.analysis.amplification import Amplification, amplification
from deltaw.analysis.comparison import Comparison, compare
from deltaw.analysis.describe import Work, costly, describe
from deltaw.analysis.history import history
from deltaw.analysis.intruders import Intruders, intruders
from deltaw.analysis.norms import norm, norms
from deltaw.analysis.similarity import by_chance, cosine, inner, phi, phis
from deltaw.analysis.spectrum import Spectrum, directions, spectra
from deltaw.analysis.tables import table

__all__ = [
    "Amplification", "Comparison", "Intruders", "Spectrum", "Work",
    "amplification", "by_chance", "compare", "cosine", "costly", "describe", "directions", "history", "inner",
    "intruders", "norm", "norms", "phi", "phis", "spectra", "table",
]  # fmt: skip
