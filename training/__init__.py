"""Training of AlignVLM: data, collator, trainer, and the four stages."""

import os


os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # nothing phones home unless the user asks for it
