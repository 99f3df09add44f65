"""A model of NVIDIA's GPUs that predicts how long a kernel takes from its machine code, without a GPU.

machine_code  instructions with their control codes
control_flow  loops, and ways through them
hot_path      the loop that a kernel spends its time in, and one trip of it
pipes         what each instruction asks of which unit
partition     a quarter of a multiprocessor, instruction by instruction
figures       what is known of one kernel: registers, blocks, instructions, predicted clocks
remarks       what is worth a word about it
triton_code, cuda_code, peer_code    where the machine code comes from
kernels       all attention kernels of one architecture
blocks        blocks over the multiprocessors of a GPU
ranking       launch settings by their predicted clocks, and the package's table of the first few
launches      what an implementation launches, seen on a null GPU
problems      whole problems: how long all these launches take
stored        the file of predictions
"""
