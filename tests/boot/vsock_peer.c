/* A guest's end of a vsock: `vsock_peer serve PORT` takes one connection and gives back what comes; `vsock_peer call PORT`
   sends its standard input to the host's port and writes what comes back to standard output. */

#include <linux/vm_sockets.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void checked(long result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

static void write_all(int fd, const char *data, ssize_t size)
{
    while (size > 0) {
        ssize_t done = write(fd, data, size);
        checked(done, "write");
        data += done;
        size -= done;
    }
}

int main(int argc, char **argv)
{
    static char data[65536];
    struct sockaddr_vm address = { .svm_family = AF_VSOCK };
    int end = socket(AF_VSOCK, SOCK_STREAM, 0);
    ssize_t got;

    if (argc != 3)
        return 2;
    checked(end, "socket");
    address.svm_port = atoi(argv[2]);
    if (!strcmp(argv[1], "serve")) {
        address.svm_cid = VMADDR_CID_ANY;
        checked(bind(end, (struct sockaddr *)&address, sizeof address), "bind");
        checked(listen(end, 1), "listen");
        printf("listening\n");
        fflush(stdout);
        end = accept(end, NULL, NULL);
        checked(end, "accept");
        while ((got = read(end, data, sizeof data)) > 0)
            write_all(end, data, got);
        checked(got, "read");
        return 0;
    }
    address.svm_cid = VMADDR_CID_HOST;
    checked(connect(end, (struct sockaddr *)&address, sizeof address), "connect");
    if (fork() == 0) {
        while ((got = read(0, data, sizeof data)) > 0)
            write_all(end, data, got);
        shutdown(end, SHUT_WR);
        return 0;
    }
    while ((got = read(end, data, sizeof data)) > 0)
        write_all(1, data, got);
    checked(got, "read");
    return 0;
}
