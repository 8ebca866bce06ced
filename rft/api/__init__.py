"""The Python API: train, evaluate and check from a program or a notebook. `rft` itself exports its names."""
