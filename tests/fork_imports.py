"""What processes of tests have imported before they are forked (`forks.py`)."""

import gc

import accelerate
import deepspeed
import peft
import torch
import torch._dynamo
import torch.utils.tensorboard
import tqdm.auto
import transformers.models.auto.modeling_auto

import cdistill.cli
import cdistill.ops
import cdistill.train.stages
import cdistill.train.worker

assert all((accelerate, peft, torch, tqdm, transformers, cdistill))
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for minutes
torch.set_num_threads(1)
gc.collect()
gc.freeze()  # trainers collect garbage often, and need not look through all modules
