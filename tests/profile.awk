# Sums ncu's CSV of a training step by kernel: calls, time, share, and means over that time of the share of the peak rate
# that DRAM and the tensor cores had.
BEGIN { FS = "\",\"" }
{ gsub(/^"|"$/, "") }
!columns && /Kernel Name/ {
    for (columns = 1; columns <= NF; columns++)
        at[$columns] = columns
    next
}
columns && $at["ID"] ~ /^[0-9]+$/ {
    for (i = 1; i <= NF; i++)
        if (i != at["Kernel Name"]) gsub(",", "", $i)
    name = $at["Kernel Name"]
    time = $at["gpu__time_duration.sum"] / 1e6
    calls[name]++
    ms[name] += time
    dram[name] += time * $at["dram__throughput.avg.pct_of_peak_sustained_elapsed"]
    tensor[name] += time * $at["sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active"]
    total += time
    all_dram += time * $at["dram__throughput.avg.pct_of_peak_sustained_elapsed"]
    all_tensor += time * $at["sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active"]
}
END {
    if (!total) {
        print "make profile: ncu listed no kernels; see bin/profile" >"/dev/stderr"
        exit 1
    }
    printf "%-64s%6s%10s%8s%8s%8s\n", "kernel", "calls", "ms", "share", "DRAM", "tensor"
    for (name in ms)
        printf "%-64s%6d%10.3f%7.1f%%%7.1f%%%7.1f%%\n", substr(name, 1, 63), calls[name], ms[name],
            100 * ms[name] / total, dram[name] / ms[name], tensor[name] / ms[name] | "sort -k3,3nr"
    close("sort -k3,3nr")
    printf "%-70s%10.3f%8s%7.1f%%%7.1f%%\n", "together", total, "", all_dram / total, all_tensor / total
}
