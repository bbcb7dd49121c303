import logging

# before peft imports it: bitsandbytes, where it is installed, warns of kernels that nobody asked for
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
