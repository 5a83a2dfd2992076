"""`python -m llm2comp`, which launchers such as accelerate and torchrun start on every device."""

from llm2comp.cli import main

if __name__ == "__main__":
    main()
