"""`accelerate launch -m vision_attn.distill --config FILE`, and the other actions of `vision-attn distill`."""

import sys

from vision_attn.distill.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
