"""What the processes of `ranks.Ranks` have imported before they are forked."""

import gc

import accelerate
import deepspeed
import peft
import torch._dynamo
import transformers.models.auto.modeling_auto

import cdistill.ops
import cdistill.train.stages

assert all((accelerate, peft, torch, transformers, cdistill))
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes
gc.collect()
gc.freeze()  # accelerate collects garbage often, and need not look through all modules
