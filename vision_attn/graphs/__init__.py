"""CUDA graphs of whole denoisers: launches are recorded once and replayed, so that Python no longer limits small sizes.

    graphs = vision_attn.graphs.enable(pipe)
    pipe("a red apple")  # the first two steps of a size run as ever, the others replay
    print(graphs.status)
    vision_attn.graphs.disable(pipe)

It works for converted and for unconverted models. A call whose recording would not be right runs eagerly, and `status`
says why: training, hooks (offloading and caches of diffusers put them on), and models that are not on a GPU.
"""

from vision_attn.graphs.replayed import Graphs, disable, enable, replayed_of, replaying

__all__ = ["Graphs", "disable", "enable", "replayed_of", "replaying"]
