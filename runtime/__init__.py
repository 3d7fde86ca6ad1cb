"""What recognises text: backends, searches, images, commands."""

import os

# ONNX Runtime from 1.29 on reports to Microsoft, unless told otherwise before it is imported. Of documents no
# word should go out; and gathering its report overflows the stack where the command line is of tens of
# thousands of characters, as that of many images is: the import then ends in a segmentation fault.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
