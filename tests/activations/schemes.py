"""One scheme of every kind of inputs that a level can have."""

from hasten.accel.activations.scheme import InputScheme

SCHEMES = {
    "int8 token": InputScheme("int", 8, "token"),
    "int8 tensor": InputScheme("int", 8, "tensor"),
    "int8 tensor static": InputScheme("int", 8, "tensor", static=True),
    "int4 token": InputScheme("int", 4, "token"),
    "int8 token asymmetric": InputScheme("int", 8, "token", symmetric=False),
    "int8 tensor static asymmetric": InputScheme("int", 8, "tensor", static=True, symmetric=False),
    "fp8 token": InputScheme("float", 8, "token"),
    "fp8 tensor static": InputScheme("float", 8, "tensor", static=True),
    "fp8 group": InputScheme("float", 8, "group", 128),
    "mxfp8": InputScheme("float", 8, "group", 32, scale="power_of_two"),
    "mxfp4": InputScheme("float", 4, "group", 32, scale="power_of_two"),
    "nvfp4": InputScheme("float", 4, "tensor_group", 16, scale="fp8"),
}
