"""Pure tensor functions shared by the algorithms, independent of models and configs."""
