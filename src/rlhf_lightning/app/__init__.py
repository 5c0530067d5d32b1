"""A page in the browser, and the terminal: talk to models, compare them, and say which answer is better."""
