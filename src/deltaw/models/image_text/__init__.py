"""Image-text models of ours, known to transformers' Auto classes once `deltaw.core.plugins` has loaded this package."""
