"""The attention kernels for Hopper, in Pallas' Mosaic GPU dialect; `kernels.pallas_gpu` calls them."""
