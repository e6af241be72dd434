"""From documents to batches: sources -> tokenizers -> packing -> pipeline.

A batch is a dict of NumPy arrays, all [B, L]:

    inputs       int32    the token read at each place
    targets      int32    the token to be predicted there
    weights      float32  1 where the target counts, 0 at padding
    segment_ids  int32    1, 2, ... for the document pieces of a row, in order; 0 is padding
    positions    int32    0, 1, ... within each piece
"""
