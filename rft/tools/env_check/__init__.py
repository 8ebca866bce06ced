"""`rft env check`: run an environment without training, and report mistakes that would show up in a run."""
