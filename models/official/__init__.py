"""Files of official models: configs, tables of weight names, vocabularies."""
