"""Files and folders that runs write: whole or not at all, resumed by the code and settings that began them."""
