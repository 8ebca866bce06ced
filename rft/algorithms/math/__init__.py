"""Pure functions on tensors that the algorithms share. Nothing here knows a model or a config."""
