# The .NET reference packs' XML documentation as plain English: one paragraph a member, one document a type, documents
# separated by <|endoftext|>. POSIX awk, mawk and gawk agree: LC_ALL=C awk -f apidocs.awk FILE.xml... > text
# A paragraph seen before is dropped, for overloads repeat each other, and every 50th document is printed first: so
# validation text taken from the front is of the same kind as the training text and no paragraph is in both.

BEGIN { RS = "<" }  # a record is a tag with its attributes, ">", and the text up to the next tag

{
    end = index($0, ">")
    tag = substr($0, 1, end - 1)
    text = substr($0, end + 1)
    name = tag
    sub(/[ \t\r\n\/].*/, "", name)
}

tag ~ /^member / {
    if (attribute("name") ~ /^T:/) endDocument()
    paragraph = ""
}

tag == "/member" && paragraph != "" && !(paragraph in seen) {
    seen[paragraph] = 1
    document = document paragraph "\n"
}

# The parts of a member, each with what a reader needs in front of it.
block == "" && name ~ /^(summary|param|typeparam|returns|value|exception|remarks)$/ && tag !~ /\/$/ {
    block = name
    part = text
    label = attribute("name") short(attribute("cref"))
    if (name == "returns") label = "Returns"
    next
}

block != "" && tag == "/" block {
    part = tidy(part)
    if (part != "") paragraph = paragraph (paragraph == "" ? "" : " ") (label == "" ? "" : label ": ") part
    block = ""
}

# Inside a part a tag becomes the name it carries, or the break that it stands for; sample code is left out.
block != "" {
    said = ""
    if (tag ~ /\/$/) said = short(attribute("cref")) attribute("langword") attribute("name")
    if (name == "xref") said = short("T:" attribute("uid"))
    if (name ~ /^(para|br|item|description|li|p)$/ || tag == "/para") said = " "
    if (tag == "/term") said = ":"
    if (tag == "/item" || tag == "/li") said = ";"
    if (name == "sup") said = "^"
    if (name == "code" && text ~ /\n/) text = ""
    part = part said text
}

END {
    endDocument()
    for (i = 1; i <= kept; i++) printf "%s%s", (printed++ ? "<|endoftext|>" : ""), rest[i]
}

function endDocument() {
    if (document == "") return
    if (++documents % 50) rest[++kept] = document
    else printf "%s%s", (printed++ ? "<|endoftext|>" : ""), document
    document = ""
}

function attribute(key) {
    if (!match(tag, "[ \t\r\n]" key "=\"[^\"]*\"")) return ""
    return substr(tag, RSTART + length(key) + 3, RLENGTH - length(key) - 4)
}

# M:System.Double.Equals(System.Object) is Double.Equals, T:System.Double is Double.
function short(id,   count, part) {
    sub(/\(.*/, "", id)
    gsub(/`+[0-9]+|[{][^}]*[}]/, "", id)
    if (sub(/[.]#c?ctor$/, "", id)) sub(/^M:/, "T:", id)
    count = split(id, part, /[.:]/)
    return count < 3 || id ~ /^T:/ ? part[count] : part[count - 1] "." part[count]
}

function tidy(s) {
    gsub(/[ \t\r\n]+/, " ", s)
    gsub(/[.]?; ?/, "; ", s)
    gsub(/^ |;? $/, "", s)
    gsub(/&lt;/, "<", s)
    gsub(/&gt;/, ">", s)
    gsub(/&quot;/, "\"", s)
    gsub(/&#92;/, "\\", s)
    gsub(/&amp;/, "\\&", s)
    return s ~ /[A-Za-z0-9)]$/ ? s "." : s
}
