"""Lists the contents of this folder. The right column says what a flat file needs when it is copied.

    resnet.py alexnet.py    trunks                                                        torch
    sinkhorn.py             balanced assignment of a batch or a whole data set            torch
    kmeans.py               k-means, nearest centroid, PCA whitening                      torch
    optim.py                LARC, learning-rate schedules                                 torch
    multicrop.py            crops cut by workers, colours changed on the device           torchvision, Pillow
    distributed.py          communication between processes, rows sharded over ranks      engine/errors.py
    batchnorm.py            batch norm and dropout over ranks, `parallel(model)`          distributed.py
    data.py                 open_images, the order of an epoch, the loader                multicrop, sources/
    features.py             features of a data set, sharded over ranks; k-NN              data, distributed

    sources/     image sources: files, lists, tars, torchvision's sets, drawn shapes, your own code
    engine/      what surrounds the training loop: options, launch, run directory, log, checkpoints
    weights/     reads and writes other projects' checkpoints: python -m common.weights FILE
    evaluation/  code shared by the evaluation scripts

A file imports only from earlier parts of this list: engine/errors.py, engine/files.py; resnet.py to
distributed.py; sources; batchnorm.py, data.py; features.py; engine; weights; evaluation. A test checks this.
"""
