"""The names by which servers and other programs know levels: `scheme=fp8`. It imports nothing: options read it."""

# Groups whose size is open, in level names.
AUTO_GROUPS = "gauto"
# Level names. Integers have groups of 128 columns, or of the largest smaller size that divides the layer's columns.
SCHEMES = {
    "w4a16": "w4gauto",
    "w8a16": "w8gauto",
    "w8a8": "w8a8",
    "w8a8_static": "w8a8s",
    "w4a8": "w4gautoa8",
    "w4afp8": "w4g128afp8",
    "fp8": "fp8",
    "fp8_static": "fp8_static",
    "fp8_block": "fp8_block",
    "mxfp8": "mxfp8",
    "mxfp4": "mxfp4",
    "mxfp4a16": "mxfp4a16",
    "nvfp4": "nvfp4",
    "nvfp4a16": "nvfp4a16",
    # llama.cpp's.
    **{name: name for name in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")},
}
