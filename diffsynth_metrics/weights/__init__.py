"""Where the files of a metric come from, and how they get into a network.

model_config.py  ModelConfig, the value that says where files are
hub.py           ModelScope and Hugging Face
checkpoint.py    files to verified weights
placement.py     one network over several devices
"""
