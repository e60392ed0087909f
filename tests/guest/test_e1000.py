"""Stock Linux drives the 82540EM: its own e1000 reads the EEPROM, negotiates the link, and carries TCP both ways."""
import subprocess
import zlib

SIZE = 3_000_000


def test_linux_uses_its_driver(boot, lab, tap):
    guest = boot(kernel=lab / "vmlinuz-amd64", initrd=lab / "initramfs-amd64.gz", taps=[f"{tap},mac=52:54:00:7f:0d:cb,model=e1000"],
                 append="console=ttyS0 panic=-1 quiet net=10.77.0.2/24 shell=ttyS0")
    guest.expect("GUEST UP", 400)
    guest.expect("# ")
    assert guest.run("cat /sys/class/net/eth0/address; readlink /sys/class/net/eth0/device/driver").split() == [
        "52:54:00:7f:0d:cb", "../../../bus/pci/drivers/e1000"]
    guest.run("for try in $(seq 100); do [ $(cat /sys/class/net/eth0/carrier) = 1 ] && break; usleep 100000; done; "
              "[ $(cat /sys/class/net/eth0/speed) = 1000 ]", 60)
    assert " 0% packet loss" in guest.run("ping -c 3 10.77.0.1", 60)
    assert " 0% packet loss" in guest.run("ping -c 2 -s 4000 10.77.0.1", 60)

    data = bytes(i * i & 255 for i in range(SIZE))       # there and back: large sends one way, many frames the other
    with subprocess.Popen(["socat", "-u", "OPEN:/dev/stdin", "TCP-LISTEN:7001,reuseaddr"], stdin=subprocess.PIPE) as source:
        guest.send("nc 10.77.0.1 7001 >/tmp/data; echo 'came' 'in'")
        source.stdin.write(data)
        source.stdin.close()
        guest.expect("came in", 120)
    assert guest.run("wc -c </tmp/data") == str(SIZE)
    with subprocess.Popen(["socat", "-u", "TCP-LISTEN:7002,reuseaddr", "STDOUT"], stdout=subprocess.PIPE) as sink:
        guest.run("for try in $(seq 50); do nc 10.77.0.1 7002 </tmp/data && break; usleep 200000; done", 120)
        assert zlib.crc32(sink.communicate(timeout=60)[0]) == zlib.crc32(data)
    assert guest.run("cat /sys/class/net/eth0/statistics/rx_errors /sys/class/net/eth0/statistics/tx_errors").split() == ["0", "0"]
    guest.send("exit")
    assert guest.wait(120) == 0
