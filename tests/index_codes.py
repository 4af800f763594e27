"""The codes that an index stores, to compare indexes by."""

import faiss
import numpy as np

from indexing.build import ivf_of, list_sizes, stored_ids


def codes_by_id(index):
    """{id: (list, code)}: what an answer is computed from."""
    if isinstance(index, faiss.IndexIDMap2):
        return {i: (0, index.reconstruct(i).tobytes()) for i in stored_ids(index).tolist()}
    ivf, found = ivf_of(index), {}
    for number, size in enumerate(list_sizes(index).tolist()):
        if size:
            ids = faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size).tolist()
            found |= dict(
                zip(ids, ((number, code) for code in list_codes(ivf, number)), strict=True)
            )
    return found


def list_codes(ivf, number):
    size, codes = ivf.invlists.list_size(number), ivf.invlists.get_codes(number)
    if not isinstance(ivf, faiss.IndexIVFFastScan):
        rows = faiss.rev_swig_ptr(codes, size * ivf.code_size).reshape(size, -1)
        return [row.tobytes() for row in rows]
    packer = ivf.get_CodePacker()
    unpacked = np.empty((size, packer.code_size), np.uint8)
    for place in range(size):
        packer.unpack_1_c(codes, place, faiss.swig_ptr(unpacked[place]))
    return [row.tobytes() for row in unpacked]
