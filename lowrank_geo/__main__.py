"""`python -m lowrank_geo`, which torchrun can start."""

from lowrank_geo.cli import main

if __name__ == "__main__":
    main()
