"""How a model is run: backbone and output layer apart, without padding, packed rows and shared prefixes."""
