"""The parts of the CIFAR-10 training pipeline; `train_ddp.py` puts them together."""
