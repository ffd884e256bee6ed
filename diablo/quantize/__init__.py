"""Quantised base models: packed weights of 2 to 8 bits, and adapters trained on them.

from diablo.quantize import QuantizationSettings, calibration_windows, load_quantized, quantize_model

settings = QuantizationSettings("magr", bits=2, group_size=64)
quantize_model(base, settings, folder, calibration_windows(tokens, 128, 2048))
model = get_peft_model(load_quantized(folder), DiabloConfig(num_blocks=64))
"""

from diablo.quantize.gptq import gptq
from diablo.quantize.grids import QuantizedWeight, normal_float, normal_float_levels, round_to_nearest
from diablo.quantize.magr import magr
from diablo.quantize.merging import GridMerge, dequantize_model, merge_dequantized, merge_to_grid
from diablo.quantize.model import quantize_model
from diablo.quantize.quantized_linear import QuantizedLinear, replace_linears
from diablo.quantize.settings import QuantizationSettings, calibration_windows
from diablo.quantize.storage import load_quantized, quantized_layers, save_quantized, sizes

__all__ = [
    "GridMerge",
    "QuantizationSettings",
    "QuantizedLinear",
    "QuantizedWeight",
    "calibration_windows",
    "dequantize_model",
    "gptq",
    "load_quantized",
    "magr",
    "merge_dequantized",
    "merge_to_grid",
    "normal_float",
    "normal_float_levels",
    "quantize_model",
    "quantized_layers",
    "replace_linears",
    "round_to_nearest",
    "save_quantized",
    "sizes",
]
