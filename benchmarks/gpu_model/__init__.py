"""A model of NVIDIA's GPUs that predicts how long a kernel takes from its machine code, without a GPU.

machine_code  instructions, control codes, loops
hot_path      which loop, and which way through it, a kernel spends its time on
pipes         what each instruction asks of which unit
partition     one quarter of a multiprocessor, clock by clock
figures       what is known of one kernel: registers, blocks, instructions, predicted clocks
remarks       what is worth a word about it
triton_code, cuda_code, peer_code    where the machine code comes from
problems      whole problems: blocks over 132 multiprocessors, bytes, launches
"""
