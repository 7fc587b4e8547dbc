#!/usr/bin/env python3
"""Sup-tickets on ImageNet: the same program as main.py, under the name that the method has on CIFAR."""

from main import main

from sparselearning.script import run_script

if __name__ == "__main__":
    run_script(main)
