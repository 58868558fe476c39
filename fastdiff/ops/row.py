"""Where each coefficient of a step stands in a row of the table; `csrc/step_row.h` holds the same numbers.

With m the guided model output and D = clamp(ax*x + am*m, -clip, clip), a row gives

    x'           = sum over INPUTS of row[NEW_X] * input
    history'     = sum over INPUTS of row[NEW_HISTORY] * input
    anchor'      = sum over INPUTS of row[NEW_ANCHOR] * input
    model input' = row[INPUT_SCALE] * x'

Where an image is kept (inpainting), x' is row[KNOWN] . (image, noise) instead: the image at the noise level of x'. With
v the network's own variance channels (learned-range DDPM), the noise is multiplied by exp(row[VARIANCE] * v).
"""

INPUTS = ("x", "m", "D", "anchor", "hist1", "hist2", "hist3", "noise")

ROW_SIZE = 32
GUIDANCE = 0
PREDICTION = slice(1, 3)
CLIP = 3
NEW_X = slice(4, 12)
NEW_HISTORY = slice(12, 20)
NEW_ANCHOR = slice(20, 28)
INPUT_SCALE = 28
KNOWN = slice(29, 31)
VARIANCE = 31
