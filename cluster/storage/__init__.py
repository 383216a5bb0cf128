"""Files behind URIs: fetched, mirrored and named as the user gave them."""
