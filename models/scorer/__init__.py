"""The small image-text scorer that cleans the raw records before anything is trained on them."""
