{{- define "tav-opt.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "tav-opt.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tav-opt.labels" -}}
{{ include "tav-opt.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "tav-opt.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}

{{/* The claim that is mounted; empty where the clips are pulled into the pod itself. */}}
{{- define "tav-opt.claim" -}}
{{- $models := .Values.models -}}
{{- if and $models.existingClaim $models.claim.create -}}
{{- fail "models: existingClaim and claim.create are two places: give one" -}}
{{- else if not (or $models.existingClaim $models.claim.create $models.pull.url) -}}
{{- fail "models: say where the clips are: existingClaim, claim.create or pull.url" -}}
{{- else if $models.existingClaim -}}
{{- $models.existingClaim -}}
{{- else if $models.claim.create -}}
{{- include "tav-opt.fullname" . }}-models
{{- end -}}
{{- end -}}

{{/* The page's pods are no servers: another name, so that nothing that selects those finds them. */}}
{{- define "tav-opt.page.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 58 | trimSuffix "-" }}-page
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tav-opt.page.labels" -}}
{{ include "tav-opt.page.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "tav-opt.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "tav-opt.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}
