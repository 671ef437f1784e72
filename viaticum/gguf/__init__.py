"""GGUF files: read, checked, and converted into folders that transformers reads.

    file            metadata and tensor table of a file or its shards
    merging         shards made one file
    architectures   what the tensors are called in transformers
    blocks          unpacking tensors, and 4-bit blocks as they are
    config          the configuration, rotation included
    split_patterns  how byte-level vocabularies split a text
    tokenizer       the tokenizer
    conversion      all of it into a folder
    parallel        `map` over threads, in order

Reading headers and 4-bit blocks needs numpy alone, the rest the extra `local`.
"""
