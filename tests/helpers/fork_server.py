"""Imported last by the fork server, and nowhere else: what its children would each do for themselves.

Reading a command line fills caches of signatures and types, for most of a second. And what is there by now, a million
objects, no child looks through for garbage; DeepSpeed lets it do so whenever it sets up ZeRO-3.
"""

import contextlib
import gc
import io
import logging
import sys
import warnings

from rlhf_lightning.cli.main import main

path = [*sys.path]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    main(["fit", "--config=sft.yaml", "--print_config"])
sys.path[:] = path  # the command line finds modules of its working folder

with contextlib.suppress(ImportError):  # of older transformers
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")

# `helpers.stages` has silenced what a command line says.
logging.getLogger("pytorch_lightning").setLevel(logging.INFO)

gc.collect()
gc.freeze()
