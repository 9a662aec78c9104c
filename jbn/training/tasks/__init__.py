"""What a model is trained for: losses, metrics and pictures, one file a task."""

from jbn.training.tasks.gan import GAN as GAN
from jbn.training.tasks.supervised import Supervised as Supervised
from jbn.training.tasks.task import Task as Task
