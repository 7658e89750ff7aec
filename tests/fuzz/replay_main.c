/*
 * Runs a fuzz target without a fuzzer: over every file of the folders given as arguments, and over
 * truncations and flips of the small ones. So the corpus is a test on every compiler, and each
 * decoder meets some thousand broken inputs on every run. With sanitizers it finds what they find.
 *
 *     replay_options tests/fuzz/corpus/options
 *
 * Exit 77 (a skip) when there is no file, 1 when a folder cannot be read.
 */
#include <dirent.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define FILE_BYTES_MAX     ((size_t)64 << 20)
#define TRUNCATE_BYTES_MAX ((size_t)4096) /* files below this are tried at every length */
#define FLIPS_OF_LARGE     ((size_t)128)
#define PATH_BYTES         4096
#define EXIT_SKIP          77

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

typedef struct {
    size_t files, inputs;
} counts;

/* The bytes in a block of exactly their size, so that a sanitizer sees a read past the end. */
static void run_input(const uint8_t *data, size_t size, counts *count)
{
    uint8_t *copy = malloc(size ? size : 1);
    if (!copy) {
        fprintf(stderr, "replay: no memory for an input of %zu bytes\n", size);
        exit(1);
    }
    if (size)
        memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
    count->inputs++;
}

static void run_variants(uint8_t *data, size_t size, counts *count)
{
    static const uint8_t flips[] = {0x01, 0x80, 0xff};
    if (size < TRUNCATE_BYTES_MAX)
        for (size_t n = 0; n < size; n++)
            run_input(data, n, count);
    /* All bytes of a small file; of a large one the head, where its format is, and a sample. */
    size_t step = size < TRUNCATE_BYTES_MAX ? 1 : size / FLIPS_OF_LARGE;
    for (size_t at = 0; at < size; at += at < FLIPS_OF_LARGE ? 1 : step) {
        uint8_t kept = data[at];
        data[at] = kept ^ flips[at % sizeof flips];
        run_input(data, size, count);
        data[at] = kept;
    }
}

static int read_file(const char *path, size_t size, uint8_t *data)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        return -1;
    size_t n = fread(data, 1, size, file);
    fclose(file);
    return n == size ? 0 : -1;
}

static int run_file(const char *path, counts *count)
{
    struct stat info;
    if (stat(path, &info) != 0) {
        fprintf(stderr, "replay: cannot read '%s': %s\n", path, strerror(errno));
        return 1;
    }
    if (!S_ISREG(info.st_mode))
        return 0;
    if ((uintmax_t)info.st_size > FILE_BYTES_MAX) {
        fprintf(stderr, "replay: '%s' has more than %zu bytes\n", path, FILE_BYTES_MAX);
        return 1;
    }
    size_t size = (size_t)info.st_size;
    uint8_t *data = malloc(size ? size : 1);
    if (!data || read_file(path, size, data) != 0) {
        fprintf(stderr, "replay: cannot read '%s'\n", path);
        free(data);
        return 1;
    }
    /* The name comes first: it is the last line when an input crashes. */
    printf("%s\n", path);
    fflush(stdout);
    run_input(data, size, count);
    run_variants(data, size, count);
    free(data);
    count->files++;
    return 0;
}

static int run_folder(const char *folder, counts *count)
{
    struct dirent **entries = NULL;
    int n = scandir(folder, &entries, NULL, alphasort);
    if (n < 0) {
        if (errno == ENOENT)
            return 0;
        fprintf(stderr, "replay: cannot read the folder '%s': %s\n", folder, strerror(errno));
        return 1;
    }
    int failed = 0;
    for (int i = 0; i < n; i++) {
        char path[PATH_BYTES];
        int length = snprintf(path, sizeof path, "%s/%s", folder, entries[i]->d_name);
        if (entries[i]->d_name[0] != '.')
            failed |= length >= (int)sizeof path || run_file(path, count);
        free(entries[i]);
    }
    free(entries);
    return failed;
}

int main(int argc, char **argv)
{
    counts count = {0};
    int failed = 0;
    for (int i = 1; i < argc; i++)
        failed |= run_folder(argv[i], &count);
    if (failed)
        return 1;
    if (count.files == 0) {
        printf("SKIP: no corpus file in %s\n", argc > 1 ? argv[1] : "(no folder given)");
        return EXIT_SKIP;
    }
    printf("%zu files, %zu inputs\n", count.files, count.inputs);
    return 0;
}
