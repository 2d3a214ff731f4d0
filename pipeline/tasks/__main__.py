from pipeline.stage import main
from pipeline.tasks.config import STAGE

if __name__ == "__main__":
    main(STAGE)
