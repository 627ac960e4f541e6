"""The tests. Nothing in them may reach for a hub: this must be said before the first import of its client."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
