"""Distillation: one training loop that makes a good model of a converted one, for every processor and host.

    accelerate launch -m vision_attn.distill --config examples/distill/flux_clear.yaml
    vision-attn distill generate | cache | train | eval --config examples/distill/emoji_clear.yaml

The teacher is the same model with its own attention. The student learns from the data (task loss), from the teacher's
prediction, and from the outputs of the teacher's attention layers. Read `loop.train` first.
"""
