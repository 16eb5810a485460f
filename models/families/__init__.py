"""Language-model families; each is a folder of config.py, model.py and hf.py."""
