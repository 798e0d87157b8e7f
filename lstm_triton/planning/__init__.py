"""Which path does a call take, and which config do its kernels run with?"""
