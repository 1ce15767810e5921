/* The Linux side of pci_dma.py: a driver in user space, as root, for the function in slot 5. It gives the device a page of
 * its own for DMA and a message for the local APIC, and waits for both. Build: gcc -O2 -static pci_dma_driver.c
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define FUNCTION "/sys/bus/pci/devices/0000:00:05.0/"
#define PAGE 4096
#define VECTOR 0xfd /* Linux's rescheduling interrupt (arch/x86/include/asm/irq_vectors.h): it is counted, and harmless */

enum { COMMAND = 4, BAR0 = 0x10, MSI = 0x40 }; /* in configuration space */
enum { ADDRESS = 0, LENGTH = 1, START = 2 }; /* registers, 32 bits each */

static void must(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(1);
    }
}

static int opened(const char *path)
{
    int fd = open(path, O_RDWR | O_SYNC);
    must(fd >= 0, path);
    return fd;
}

static void config(int fd, int at, const void *data, size_t size)
{
    must(pwrite(fd, data, size, at) == (ssize_t)size, "configuration space");
}

/* Where the page that is at `address` here is in the guest's memory: Documentation/admin-guide/mm/pagemap.rst. */
static uint64_t physical(const void *address)
{
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    must(fd >= 0 && pread(fd, &entry, 8, (uintptr_t)address / PAGE * 8) == 8 && entry >> 63, "pagemap");
    close(fd);
    return (entry & ((1ULL << 55) - 1)) * PAGE;
}

/* How often all processors were interrupted by VECTOR. */
static long interrupts(void)
{
    char line[4096], *at, *next;
    long sum = 0;
    FILE *file = fopen("/proc/interrupts", "r");
    must(file != NULL, "/proc/interrupts");
    while (fgets(line, sizeof line, file) != NULL) {
        if ((at = strstr(line, "RES:")) == NULL)
            continue;
        for (at += 4;; at = next) {
            long count = strtol(at, &next, 10);
            if (next == at)
                break;
            sum += count;
        }
    }
    fclose(file);
    return sum;
}

int main(void)
{
    const uint16_t master = 6, on = 1, vector = VECTOR;
    const uint64_t apic = 0xfee00000;
    int space = opened(FUNCTION "config");
    int bar = opened(FUNCTION "resource0");
    volatile uint32_t *registers = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, bar, 0);
    char *text = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED, -1, 0);
    uint32_t base = 0;
    must(registers != MAP_FAILED && text != MAP_FAILED, "mmap");
    must(pread(space, &base, 4, BAR0) == 4, "BAR 0");
    registers += (base & (PAGE - 16)) / 4; /* of a small BAR the whole page is mapped */
    strcpy(text, "hello from linux");
    config(space, COMMAND, &master, sizeof master); /* memory and DMA */
    config(space, MSI + 4, &apic, sizeof apic);
    config(space, MSI + 12, &vector, sizeof vector);
    config(space, MSI + 2, &on, sizeof on);
    long before = interrupts();
    registers[ADDRESS] = physical(text);
    registers[LENGTH] = strlen(text);
    registers[START] = 1;
    for (int n = 0; n < 1000 && interrupts() == before; n++)
        usleep(1000);
    printf("%ld interrupt, text: %s\n", interrupts() - before, text);
    return 0;
}
