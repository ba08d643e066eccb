"""InLine-*: backbones with injective linear attention."""
