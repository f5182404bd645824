"""The digits: rendering, the model and its training; imported as ``atm_triton.digits``."""
