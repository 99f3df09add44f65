"""A model of NVIDIA's GPUs that predicts how long a kernel takes from its machine code, without a GPU.

machine_code  instructions with their control codes
control_flow  loops, and paths through them
hot_path      the main loop of a kernel, and one trip of it
pipes         the clocks that each instruction takes of each unit
partition     a quarter of a multiprocessor, instruction by instruction
figures       figures of one kernel: registers, blocks, instructions, predicted clocks
remarks       remarks on these figures
triton_code, cuda_code, peer_code    sources of machine code
kernels       all attention kernels of one architecture
blocks        blocks over the multiprocessors of a GPU
ranking       launch settings ranked by predicted clocks, and the package's table of the best few
launches      the launches of an implementation, recorded on a null GPU
problems      whole problems: the predicted time of all their launches
stored        the file of predictions
"""
