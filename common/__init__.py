"""The map of this folder. A flat file may be copied, a folder may be ignored.

    resnet.py alexnet.py    trunks                                                        torch alone
    sinkhorn.py             balanced assignment, of a batch and of a data set             torch alone
    kmeans.py               k-means, nearest centroid, PCA whitening                      torch alone
    optim.py                LARC, schedules of the learning rate                          torch alone
    multicrop.py            crops in the worker, colours on the device                    torchvision, Pillow
    distributed.py          one process or many: sums, gathers, rows sharded over ranks   engine/errors.py
    batchnorm.py            batch norm and dropout over ranks, `parallel(model)`          distributed.py
    data.py                 open_images, the order of an epoch, the loader                multicrop, sources/
    features.py             features of a data set, each rank its rows; k-NN              data, distributed

    sources/     where images come from: files, lists, tars, torchvision's sets, drawn shapes, your own
    engine/      around a training: options, launch, the run directory, log, checkpoints
    weights/     other projects' checkpoints in, ours out: python -m common.weights FILE
    evaluation/  what the evaluations share

Imports go one way: engine/errors.py and engine/files.py, then the flat files, in that order, engine, weights,
evaluation. tests/test_aligned.py holds them to it.
"""
