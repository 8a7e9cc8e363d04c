"""Tiny tensors gain nothing from many threads, and on a busy machine the threads wait for each other: one is faster by far."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
