"""What carries what: every registered method on every host, written out. True, or words of the refusal."""

NO_WEIGHT = "none of which can carry"
NO_ROWS = "token rows belong to an embedding or a head"

MATRIX: dict[str, dict[str, bool | str]] = {
    "dora": {
        "linear": True,
        "linear-no-bias": True,
        "linear-one-output": True,
        "linear-fused-qkv": True,
        "conv1d-of-gpt2": True,
        "embedding": True,
        "conv1d": True,
        "conv2d": True,
        "conv2d-circular": True,
        "conv2d-grouped": True,
        "conv2d-depthwise": True,
        "conv3d": True,
        "layernorm": NO_WEIGHT,
    },
    "full": {
        "linear": True,
        "linear-no-bias": True,
        "linear-one-output": True,
        "linear-fused-qkv": True,
        "conv1d-of-gpt2": True,
        "embedding": True,
        "conv1d": True,
        "conv2d": True,
        "conv2d-circular": True,
        "conv2d-grouped": True,
        "conv2d-depthwise": True,
        "conv3d": True,
        "layernorm": True,
    },
    "lora": {
        "linear": True,
        "linear-no-bias": True,
        "linear-one-output": True,
        "linear-fused-qkv": True,
        "conv1d-of-gpt2": True,
        "embedding": True,
        "conv1d": True,
        "conv2d": True,
        "conv2d-circular": True,
        "conv2d-grouped": True,
        "conv2d-depthwise": True,
        "conv3d": True,
        "layernorm": NO_WEIGHT,
    },
    "token_rows": {
        "linear": True,
        "linear-no-bias": True,
        "linear-one-output": True,
        "linear-fused-qkv": True,
        "conv1d-of-gpt2": True,
        "embedding": True,
        "conv1d": NO_ROWS,
        "conv2d": NO_ROWS,
        "conv2d-circular": NO_ROWS,
        "conv2d-grouped": NO_ROWS,
        "conv2d-depthwise": NO_ROWS,
        "conv3d": NO_ROWS,
        "layernorm": NO_WEIGHT,
    },
}

COUNT = {  # trainable parameters at one weight [m, n, *kernel] with rank r; `extra` counts the layer's bias
    "dora": lambda m, n, kernel, r, extra: r * (n * kernel + m) + m,
    "full": lambda m, n, kernel, r, extra: m * n * kernel + extra,
    "lora": lambda m, n, kernel, r, extra: r * (n * kernel + m),
    "token_rows": lambda m, n, kernel, r, extra: r * n,  # r rows of n numbers
}
