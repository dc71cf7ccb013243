"""One module per training framework, each with the function that makes what the framework calls."""
